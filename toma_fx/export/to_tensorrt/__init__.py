"""TensorRT engines, and what TensorRT takes."""
