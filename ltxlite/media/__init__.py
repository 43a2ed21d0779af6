"""Files to tensors and back: pictures, sound and clips, through PyAV and Pillow."""
