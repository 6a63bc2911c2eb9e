"""What a detector looks at, and pictures of what it finds. Chapter 9."""
