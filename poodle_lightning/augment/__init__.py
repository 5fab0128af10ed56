"""Random image operations, drawn from the images' keys; no gradient, float32."""
