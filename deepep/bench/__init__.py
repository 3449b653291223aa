"""`python -m deepep bench`: how long dispatch and combine take, by the method that `benchmarks/README.md` states."""
