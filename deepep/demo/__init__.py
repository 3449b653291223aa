"""`python -m deepep demo`: a small mixture of experts learns to read handwritten digits, its experts spread over ranks."""
