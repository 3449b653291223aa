"""`python -m deepep demo`: a mixture of experts, spread over ranks, learns to read handwritten digits."""
