"""Out of PyTorch: a detector as an ONNX file, or as a program of torch.export.

graph is the detector as a function of tensors, which exporters can trace; program and onnx write
it; check runs a file and compares. The operator itself becomes plain operations in `ops.onnx`.
A program that was saved (torch.export.save, AOTInductor) calls the operator by its name, so
`import deformable_detr.ops` comes before it is loaded.
"""
