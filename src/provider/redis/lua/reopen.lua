-- Making finished deliveries wait again, as a part of the scripts that do it.

-- Makes a delivery that is loaded wait again, with fresh budgets. Its event's progress must be loaded.
local function reopen(sub, seq, d, is_replay)
  local p = progress[seq]
  p[1] = p[1] + 1
  if d[STAGE] == DEAD then
    p[3] = p[3] - 1
    call('ZREM', P .. 'dead', seq .. ':' .. sub)
  end
  d[STAGE], d[DUE], d[COMPLETED], d[TRIES], d[INFRA] = PENDING, now, 0, 0, 0
  if is_replay then d[REPLAY] = 1 end
  changed[sub][seq] = true
  count('dp', 1)
  if d[KEYED] == 1 then open_key(sub, seq, d[KEY]) end
  line_up(sub, seq, d)
end

-- The progress of a completed event is not kept: how many of its deliveries were begun is counted anew.
local function load_begun(seq, event)
  load_progress({ seq })
  local p = progress[seq]
  if p[1] > 0 or p[2] > 0 or p[3] > 0 then return end
  local begun = 0
  for _, sub in ipairs(subs_of(event)) do
    load_deliveries(sub, { seq })
    local d = deliveries[sub][seq]
    if d and d[STARTED] > 0 then begun = begun + 1 end
  end
  p[2], p[5] = begun, begun
end
