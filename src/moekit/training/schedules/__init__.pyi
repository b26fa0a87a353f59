from .base import Schedule as Schedule, read_schedule as read_schedule
