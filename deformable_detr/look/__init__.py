"""What a detector looks at, data first and figures second. Chapter looking.

sampling: where deformable attention sampled, in any model. attention: the weights of dense
attention. gradients: which pixels move a detection. figures: all three, drawn over the image.
pictures: boxes on images, of detections and of data sets.
"""
