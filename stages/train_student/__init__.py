"""Stage two: training CogVideoX from the cache only; never imports sam2."""
