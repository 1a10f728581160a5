import sys
from recipes.reinforcement.graphs import *
def main() -> None:
    settings, lab = read_lab(sys.argv[1:], __doc__)
    a = settings.course
    for task in a.tasks:
        for objective in a.objectives:
            lab.run(task, objective, a.steps, a.seeds, a.measure_after)
if __name__ == "__main__":
    main()
