"""Faults under load: a workload, clients that write down what they were told, faults, and a checker that compares.

    python -m benchmarks.chaos --faults kill-agent,stop-server --tasks 10000 --seed 7 --log sqlite

`campaign` runs one class of faults, `checker` is pure, `report` prints. docs/faults.md has the figures.
"""
