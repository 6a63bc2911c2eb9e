"""Layers: bilinear sampling (chapter 1), position encodings (chapter 2), deformable attention on
one scale (chapter 4) and many (chapter 5), and what stands around them."""
