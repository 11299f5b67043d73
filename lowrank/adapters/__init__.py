"""The adapters: pure mathematics (factor, gate, experts, magnitude, penalty, rates), one layer using it."""
