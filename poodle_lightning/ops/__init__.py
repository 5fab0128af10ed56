"""Pure functions: geometry, occlusion, subcrops, schedules, randomness."""
