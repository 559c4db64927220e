"""The post office of the tests."""

import time

from django.core.mail.backends.base import BaseEmailBackend

from tests.models import Entry


class JournalBackend(BaseEmailBackend):
    """Delivers into the journal, by the subject; to a full mailbox not at the first attempt."""

    def send_messages(self, messages):
        for message in messages:
            is_first = not Entry.objects.filter(key=message.subject).exists()
            Entry.objects.create(key=message.subject, task_id="", what="begins")
            # Whatever was sent meanwhile has the time to meet the lock.
            time.sleep(0.3)
            Entry.objects.create(key=message.subject, task_id="", what="ends")
            if is_first and message.to == ["full@example.org"]:
                raise OSError("the mailbox is full")
        return len(messages)
