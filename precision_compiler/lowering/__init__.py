"""What products in narrow formats become on GPUs: operands, operations, and what supports them."""
