import sys
from recipes.reinforcement.graphs import *
def main() -> None:
    settings, lab = read_lab(sys.argv[1:], __doc__)
    a = settings.start
    for task in TASKS:
        lab.before(task, a.steps, a.rows)
    for seed in a.seeds:
        for task in (GIVEN_UP, MIXTURE, HALVES):
            lab.run(task, "grpo", a.steps, [seed], a.measure_after)
if __name__ == "__main__":
    main()
