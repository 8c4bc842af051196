"""Stage two: CogVideoX trained from the cache alone; never imports sam2."""
