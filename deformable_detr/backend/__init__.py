"""Implementations of the operator; `deformable_detr.ops` picks one."""
