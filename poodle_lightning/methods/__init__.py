"""One paper per file, read top-down."""
