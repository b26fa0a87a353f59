from .report import CheckReport as CheckReport, Finding as Finding
from .whole import check as check
