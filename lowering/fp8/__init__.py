"""FP8 products: casts, scales, matrix products, and the linear layer made of them."""
