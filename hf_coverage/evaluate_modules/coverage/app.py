"""The Space of the metric: a table of log-probabilities in, the coverage profile out."""

from pathlib import Path

from hf_coverage.evaluate_modules.widget import launch_widget

if __name__ == "__main__":
    launch_widget(Path(__file__).with_name("coverage.py"))
