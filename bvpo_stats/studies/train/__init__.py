"""The train study: BVPO, DPO and SimPO on preference pairs."""
