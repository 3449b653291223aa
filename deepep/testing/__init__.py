"""The test kit: for deepep itself and for people who write backends."""
