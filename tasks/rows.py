"""Your own rows, in any format that train.py reads; the last turn is the correct answer."""

from engine.evaluation.evaluate import Task, load_items

TASK = Task(load_items)
