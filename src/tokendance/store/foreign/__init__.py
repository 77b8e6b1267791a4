"""Dense caches that other engines made, kept as diffs against one of them, as the paper does."""
