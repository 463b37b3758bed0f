"""Image folders with captions and masks, mask shapes, caches bound to the codec that made them."""
