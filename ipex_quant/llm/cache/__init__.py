"""KV caches that the native attention reads, in float32, bfloat16, float16 or INT8."""
