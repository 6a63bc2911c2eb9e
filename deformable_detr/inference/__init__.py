"""From a model's output to detections in people's pictures.
Chapters matching_and_loss and your_own_data."""
