"""A crontab line as an APScheduler trigger: cron's own weekday numbers, and its rule about days."""

from __future__ import annotations

import importlib.util
from datetime import datetime
from typing import Any

from curate.errors import UsageError

# cron's order; APScheduler 3 counts weekdays from Monday, so it is given names
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def now() -> datetime:
    """This machine's time, with its zone."""
    return datetime.now().astimezone()


def parse_cron(cron: str) -> Any:
    """The APScheduler trigger of a crontab line, with cron's own weekday numbers and its rule that a day matches by month day or weekday."""
    if importlib.util.find_spec("apscheduler") is None:
        raise UsageError("`curate schedule` needs the extra `schedule`: pip install 'curate-dynamics[schedule]'.")
    from apscheduler.triggers.combining import OrTrigger
    from apscheduler.triggers.cron import CronTrigger

    fields = cron.split()
    try:
        if len(fields) != 5:
            raise ValueError(f"{len(fields)} fields")
        minute, hour, day, month, weekday = fields
        days = _weekdays(weekday)
        trigger: Any = CronTrigger.from_crontab(f"{minute} {hour} {day} {month} {days}")
        if not day.startswith("*") and not weekday.startswith("*"):
            month_day = CronTrigger.from_crontab(f"{minute} {hour} {day} {month} *")
            trigger = OrTrigger([month_day, CronTrigger.from_crontab(f"{minute} {hour} * {month} {days}")])
    except ValueError as error:
        raise UsageError(
            f'--cron "{cron}": expected minute hour day month weekday, such as "0 2 * * *" (every night at two); found {error}.'
        ) from None
    if trigger.get_next_fire_time(None, now()) is None:
        raise UsageError(f'--cron "{cron}": no such day ever comes.')
    return trigger


def _weekdays(field: str) -> str:
    """cron's weekday field in names, ranges and steps written out: "1-5" is mon,tue,wed,thu,fri; 0 and 7 are sun."""
    if field == "*":
        return field
    days = []
    for part in field.lower().split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        low = 0 if span == "*" else _weekday(first)
        high = 6 if span == "*" or (slash and not dash) else _weekday(last) if dash else low
        if high < low and last in ("0", "sun"):
            high = 7
        if high < low or (slash and not (step.isdigit() and int(step) > 0)):
            raise ValueError(f"the weekday {part!r}")
        days += [DAYS[day % 7] for day in range(low, high + 1, int(step or 1))]
    return ",".join(dict.fromkeys(days))


def _weekday(text: str) -> int:
    if text in DAYS:
        return DAYS.index(text)
    if text.isdigit() and int(text) <= 7:
        return int(text)
    raise ValueError(f"the weekday {text!r}")
