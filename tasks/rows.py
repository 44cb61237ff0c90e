"""Your own rows, in any format that trains; the last turn of each is the correct answer."""

from engine.evaluation.evaluate import Task, load_items

TASK = Task(load_items)
