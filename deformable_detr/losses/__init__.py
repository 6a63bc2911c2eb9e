"""What a detector is trained by: matching and the losses of matched pairs. Chapter 8."""
