"""Prints the names of all modules that are loaded."""

import sys

if __name__ == "__main__":
    print(*sys.modules)
