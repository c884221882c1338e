-- Makes the log where there is none, and answers with its epoch.

ensure_log()
return call('HGET', meta, 'epoch')
