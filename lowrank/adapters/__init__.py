"""The adapters: pure mathematics (factor, gate, experts, magnitude, penalty, rates) and the one layer that uses it."""
