-- Taking deliveries and events away, as a part of the scripts that do it.

-- Takes a loaded delivery out of every line, and its record away. The event's list and progress are the caller's.
local function remove_delivery(sub, seq, d)
  if d[STAGE] == PENDING or d[STAGE] == LEASED then
    for _, kind in ipairs({ 'q:', 'b:', 'w:', 'l:' }) do
      call('ZREM', P .. kind .. sub, seq)
    end
    if d[KEYED] == 1 then close_key(sub, seq, d[KEY]) end
    count(d[STAGE] == PENDING and 'dp' or 'dx', -1)
  elseif d[STAGE] == DEAD then
    call('ZREM', P .. 'dead', seq .. ':' .. sub)
  end
  call('HDEL', P .. 'd:' .. sub, seq)
  call('HDEL', P .. 'a:' .. sub, seq)
  deliveries[sub][seq], changed[sub][seq] = false, nil
end

-- Takes an event's content, facts and deliveries away. Its id is the caller's.
local function remove_event(seq, event)
  load_progress({ seq })
  local p = progress[seq]
  for _, sub in ipairs(subs_of(event)) do
    load_deliveries(sub, { seq })
    local d = deliveries[sub][seq]
    if d then remove_delivery(sub, seq, d) end
  end
  count(status(p[4], p[5], p[6]), -1)
  progress[seq] = nil
  call('XDEL', P .. 'log', seq .. '-0')
  call('HDEL', P .. 'ev', seq)
  call('HDEL', P .. 'pg', seq)
  call('ZREM', P .. 'open', seq)
  call('ZREM', P .. 'age', seq)
  call('ZREM', P .. 'late', seq)
  call('ZREM', P .. 't:' .. event.kind, seq)
  if call('EXISTS', P .. 't:' .. event.kind) == 0 then call('SREM', P .. 'types', event.kind) end
end
