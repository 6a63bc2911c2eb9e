"""How good a detector is and what it costs: COCO metrics, kinds of mistakes, reports, operations.
Chapters 9 and 12.
"""
