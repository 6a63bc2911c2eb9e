"""Images and annotations in COCO format: reading, checking, transforming. Chapter 12."""
