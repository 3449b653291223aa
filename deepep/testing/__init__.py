"""Test kit for people who write backends or clients: seeded cases, an oracle, local ranks, the contract as checks.

- `routing`: cases and every rank's inputs, from seeds.
- `oracle`, `oracle_low_latency`, `oracle_elastic`: what every rank must get, worked out without communication.
- `launch`: local worker ranks.
- `contract`: the checks that every backend passes, and the cases they run on.
"""
