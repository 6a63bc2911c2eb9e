"""From a model's output to detections in people's pictures.
Chapters pixels_to_boxes and your_own_data."""
