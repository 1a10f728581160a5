"use strict";
// What moves a page's charts and its table of models. It only places what Python wrote: no number is made here.
(async () => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("explorer").textContent);
  const [slider, table] = [byId("n"), byId("models")];
  const every = data.names.map((_, model) => model);
  const hidden = new Set();
  const shown = () => every.filter((model) => !hidden.has(model));
  const at = () => Number(slider.value);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const color = (model) => (dark.matches && data.colors[model] === "#000000" ? "#ffffff" : data.colors[model]);

  const pages = [];
  for (const chart of data.charts) {
    await Bokeh.embed.embed_item(chart);
    pages.push(Bokeh.documents[Bokeh.documents.length - 1]);
  }
  const fill = (page, name, rows) => {
    const source = page.get_model_by_name(name);
    source.data = Object.fromEntries(Object.keys(source.data).map((key) => [key, rows.map((row) => row[key])]));
  };

  // Lines for all that are shown, bands where they can still be told apart, a dot at every N of the slider.
  const drawProfiles = () => data.quantities.forEach((quantity, place) => {
    const models = shown();
    const banded = models.filter((model) => models.length <= 7 && !quantity.low[model].includes(null));
    fill(pages[place], "bands", banded.map((model) => ({
      x: [...data.n, ...data.n.slice().reverse()],
      y: [...quantity.low[model], ...quantity.high[model].slice().reverse()],
      color: color(model),
    })));
    fill(pages[place], "lines", models.map((model, order) => ({
      x: quantity.x,
      y: quantity.y[model],
      color: color(model),
      dash: data.dashes[model],
      width: models.length > 1 ? 3.2 - (2 * order) / (models.length - 1) : 2.2, // so that equal lines are seen
    })));
    fill(pages[place], "points", models.flatMap((model) => data.n.map((n, k) => ({
      x: n,
      y: quantity.value[model][k],
      color: color(model),
      name: data.names[model],
      n: data.n_text[k],
      text: quantity.text[model][k],
      rows: data.rows[model],
    }))));
  });

  const drawRun = (page, {value, low, high, text}) => {
    const models = shown().sort((one, other) => data.steps[one] - data.steps[other]);
    fill(page, "run", models.map((model) => ({
      x: data.steps[model],
      y: value(model),
      low: low(model) ?? value(model),
      high: high(model) ?? value(model),
      name: data.names[model],
      text: text(model),
      rows: data.rows[model],
    })));
  };
  const drawRuns = () => {
    if (data.steps === null) return;
    const [quantity] = data.quantities;
    const place = data.quantities.length;
    const now = (part) => (model) => quantity[part][model][at()];
    drawRun(pages[place], {value: now("value"), low: now("low"), high: now("high"), text: now("text")});
    const fixed = (part) => (model) => data.cross_entropy[part][model];
    if (data.cross_entropy !== null) {
      drawRun(pages[place + 1], {value: fixed("value"), low: fixed("low"), high: fixed("high"), text: fixed("text")});
    }
  };

  // The table: its cells at the slider's N, hidden models left out, in the order of the column that was chosen.
  const number = (cell) => (cell.dataset.value ? Number(cell.dataset.value) : NaN);
  const sort = (sorted) => {
    const chosen = sorted.querySelector("th[aria-sort]");
    if (chosen === null) return;
    const sign = chosen.getAttribute("aria-sort") === "ascending" ? 1 : -1;
    const compare = (one, other) => {
      const [left, right] = [one, other].map((row) => row.cells[chosen.cellIndex]);
      if (left.dataset.value === undefined) return sign * left.textContent.localeCompare(right.textContent);
      const [a, b] = [number(left), number(right)];
      return Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : sign * (a - b);
    };
    sorted.tBodies[0].append(...Array.from(sorted.tBodies[0].rows).sort(compare));
  };
  const write = (cell, text, value) => {
    const [first, ...interval] = text.split(" [");
    cell.dataset.value = value ?? "";
    cell.replaceChildren(first, ...interval.map((ends) => {
      const part = document.createElement("span");
      part.className = "interval";
      part.textContent = ` [${ends}`;
      return part;
    }));
  };
  const fillTable = () => {
    for (const row of table.tBodies[0].rows) {
      const model = Number(row.dataset.model);
      row.hidden = hidden.has(model);
      data.quantities.forEach((quantity, place) => {
        write(row.cells[place + 1], quantity.text[model][at()], quantity.value[model][at()]);
      });
    }
    for (const level of document.querySelectorAll(".level")) level.textContent = data.n_text[at()];
    sort(table);
  };
  const say = () => {
    const [quantity] = data.quantities;
    const models = shown().sort((one, other) => quantity.value[one][at()] - quantity.value[other][at()]);
    const label = quantity.label.replace(/([_@])N\b/, `$1${data.n_text[at()]}`);
    const best = models.length ? `${data.labels[models[0]]} has the least ${label}: ${quantity.text[models[0]][at()]}` : "";
    byId("least").textContent = models.length ? `${best}${models.length > 1 ? `, of ${models.length}` : ""}.` : "No model is shown.";
    slider.setAttribute("aria-valuetext", `N = ${data.n_text[at()]}`);
  };

  const move = () => {
    data.quantities.forEach((_, place) => (pages[place].get_model_by_name("at").location = data.n[at()]));
    drawRuns();
    fillTable();
    say();
  };
  const redraw = () => {
    for (const line of document.querySelectorAll("#legend line")) line.setAttribute("stroke", color(Number(line.dataset.model)));
    drawProfiles();
    move();
  };

  // What is shown, to take along.
  const records = () => Array.from(table.tBodies[0].rows).filter((row) => !row.hidden).map((row) => {
    const model = Number(row.dataset.model);
    const record = {model: data.names[model], n: data.n[at()]};
    const put = (key, ends) => Object.assign(record, {[key]: ends[0], [`${key}_low`]: ends[1], [`${key}_high`]: ends[2]});
    const parts = ["value", "low", "high"];
    for (const quantity of data.quantities) put(quantity.key, parts.map((part) => quantity[part][model][at()]));
    if (data.cross_entropy !== null) put("cross_entropy", parts.map((part) => data.cross_entropy[part][model]));
    return Object.assign(record, {rows: data.rows[model], prompts: data.prompts[model]});
  });
  const csv = () => {
    const quoted = (value) => (typeof value === "string" ? `"${value.replaceAll('"', '""')}"` : value ?? "");
    const lines = records();
    return [Object.keys(lines[0] ?? {}), ...lines.map(Object.values)].map((line) => `${line.map(quoted).join()}\n`).join("");
  };
  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  byId("csv").onclick = () => save("models.csv", "text/csv", csv());
  byId("json").onclick = () => save("models.json", "application/json", `${JSON.stringify(records(), null, 1)}\n`);

  const show = (boxes) => {
    for (const box of boxes) hidden[box.checked ? "delete" : "add"](Number(box.value));
    redraw();
  };
  const boxes = document.querySelectorAll("#legend input");
  const setAll = (checked) => show(Array.from(boxes, (box) => Object.assign(box, {checked})));
  for (const box of boxes) box.onchange = () => show([box]);
  byId("all").onclick = () => setAll(true);
  byId("none").onclick = () => setAll(false);
  for (const sorted of document.querySelectorAll("table.sortable")) {
    for (const head of sorted.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.onclick = () => {
        const next = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        for (const other of sorted.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", next);
        sort(sorted);
      };
    }
  }
  slider.oninput = move;
  dark.onchange = redraw;
  redraw();
  document.documentElement.classList.add("live");
})();
