"""The student, its adapters and heads, and the teacher's arrays beside it."""
