-- Makes dead letters wait again: of each the subscription's name, the seq, and when it died. One that is no longer so is
-- left alone. Answers with how many were changed.

local changed_count = 0
for at = 4, #ARGV, 3 do
  local sub, seq = call('HGET', P .. 'subs', ARGV[at]), ARGV[at + 1]
  if sub then
    load_deliveries(sub, { seq })
    load_progress({ seq }, sub)
    local d = deliveries[sub][seq]
    if d and d[STAGE] == DEAD and int(d[COMPLETED]) == ARGV[at + 2] then
      reopen(sub, seq, d, false)
      changed_count = changed_count + 1
    end
  end
end
finish()
return changed_count
