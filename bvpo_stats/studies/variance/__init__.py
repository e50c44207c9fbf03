"""The variance study: Appendix B of the paper."""
