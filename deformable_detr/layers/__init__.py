"""Layers: bilinear sampling (chapter sampling), position encodings (chapter attention), deformable
attention on one scale (chapter deformable_attention) and many (chapter many_scales), and what
stands around them."""
