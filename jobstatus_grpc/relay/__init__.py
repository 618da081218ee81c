"""`jobstatus relay`: from the changes of jobs to a webhook, a command or Slack, each at least once."""
