"""What this machine has, what is broken and why, and the command that it needs: `heedful doctor` and `heedful install`.

``examine()`` gives the report; ``str()`` of it is the page.
"""

from heedful.doctor.environment import Environment
from heedful.doctor.report import Report, examine

__all__ = ["Environment", "Report", "examine"]
