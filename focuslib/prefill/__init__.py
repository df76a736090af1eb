"""One patched forward pass of a stock model, and what it leaves: records, operation counts, traces."""
