"""Files to batches: scan, captions, buckets, cache, loader."""
