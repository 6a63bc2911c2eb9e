"""From a model's output to detections in people's pictures. Chapters 8 and 12."""
