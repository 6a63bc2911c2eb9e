"""How good a detector is and what it costs: COCO metrics, kinds of mistakes, reports, operations.
Chapters training and your_own_data.
"""
