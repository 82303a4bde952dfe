"""Key and value caches that the native attention reads, in bfloat16, float or INT8."""
